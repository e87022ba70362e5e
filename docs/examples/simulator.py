"""What KVM's shadow MMU does with a guest's tables: prefetch, write protection, unsync, and a large page that is split.

It is a model: nothing of KVM is needed.

Prints:

    --- a load: three tables, a leaf, and its neighbours of 8 to 15
        get_page gfn=0x1 role=0x3704 created=0x1
        get_page gfn=0x2 role=0x3703 created=0x1
        get_page gfn=0x3 role=0x3702 created=0x1
        get_page gfn=0x4 role=0x3701 created=0x1
        spte_requested gfn=0x19 level=0x1 pfn=0x100019
        set_spte gfn=0x19 level=0x1 spte=0x100019e67 sptep=0x10000003048
        set_spte gfn=0x18 level=0x1 spte=0x100018e47 sptep=0x10000003040
        set_spte gfn=0x1a level=0x1 spte=0x10001ae47 sptep=0x10000003050
        set_spte gfn=0x1b level=0x1 spte=0x10001be47 sptep=0x10000003058
        set_spte gfn=0x4 level=0x1 spte=0x100004a05 sptep=0x10000003060
    --- a store to the table: it is unsync now
        spte_requested gfn=0x4 level=0x1 pfn=0x100004
        unsync_page gfn=0x4 role=0x3701
        set_spte gfn=0x4 level=0x1 spte=0x100004e67 sptep=0x10000003060
    --- MOV to CR3: it is brought up to date
        sync_page gfn=0x4 role=0x3701 unsync=0x1
    --- the page of 2 MiB: one entry
        spte_requested gfn=0x400 level=0x2 pfn=0x100400
        set_spte gfn=0x400 level=0x2 spte=0x100400ee7 sptep=0x10000002008
    --- with dirty logging: a direct page, and one entry of 4 KiB
        spte_requested gfn=0x401 level=0x1 pfn=0x100401
        get_page gfn=0x400 role=0x3781 created=0x1
        set_spte gfn=0x401 level=0x1 spte=0x100401e67 sptep=0x10000004008
        dirty: ['0x401']
    root gfn 0x1, level 4, xwu, cr3 0x1000
      [0x000] gfn 0x2, level 3, xwu
        [0x000] gfn 0x3, level 2, xwu
          [0x000] gfn 0x4, level 1, xwu
            [0x008] 0x8000             gfn 0x18     pfn 0x100018   x-u d !
            [0x009] 0x9000             gfn 0x19     pfn 0x100019   x-u ad !
            [0x00a] 0xa000             gfn 0x1a     pfn 0x10001a   x-u d !
            [0x00b] 0xb000             gfn 0x1b     pfn 0x10001b   x-u d !
            [0x00c] 0xc000             gfn 0x4      pfn 0x100004   x-u ad !
          [0x001] gfn 0x400, level 1, xwu, direct
            [0x001] 0x201000           gfn 0x401    pfn 0x100401   x-u ad !
"""

from hvmodel.mmu import HostMemory, ShadowMmu, SimSlot, reset_all_pte_masks

P, W, U, A, D, PS = 1, 2, 4, 0x20, 0x40, 0x80
ALL = P | W | U | A | D

ram = bytearray(8 << 20)


def entry(gpa: int, value: int) -> None:
    ram[gpa : gpa + 8] = value.to_bytes(8, "little")


entry(0x1000, 0x2000 | ALL)  # PML4
entry(0x2000, 0x3000 | ALL)  # PDPT
entry(0x3000, 0x4000 | ALL)  # PD: a table of 4 KiB pages …
entry(0x3008, 0x400000 | ALL | PS)  # … and a page of 2 MiB
for i in range(12):
    entry(0x4000 + 8 * i, 0x10000 + 0x1000 * i | ALL)
entry(0x4000 + 8 * 12, 0x4000 | ALL)  # the table itself

host = HostMemory(huge=[0x400])  # the host has 2 MiB there, too
mmu = ShadowMmu(reset_all_pte_masks(46), ram, [SimSlot(0, 2048)], host=host, cr3=0x1000)


def show(title: str) -> None:
    print(f"--- {title}")
    for event in mmu.take_events():
        print("   ", event)


mmu.access(9 << 12)
show("a load: three tables, a leaf, and its neighbours of 8 to 15")
mmu.access(12 << 12, "store", (0x11000 | ALL).to_bytes(8, "little"))
show("a store to the table: it is unsync now")
mmu.mov_cr3(0x1000)
show("MOV to CR3: it is brought up to date")
mmu.access(0x200000)
show("the page of 2 MiB: one entry")
mmu.set_log_dirty(0, True)
mmu.access(0x201000, "store")
show("with dirty logging: a direct page, and one entry of 4 KiB")
print(f"    dirty: {sorted(map(hex, mmu.get_dirty_log(0)))}")
print(mmu.tree())
assert mmu.access(0x400000).fault == 4  # not present, by CPL 3
