/*
 * Looking at memory: the calls behind hvmodel.host.pagemap, smaps, numa and brk.
 *
 * As in host.h, each returns what the system call returned, or -errno, and addresses are integers.
 * Constants are bit numbers where the kernel's text has bit numbers; look.c proves those that the
 * system's headers have.
 */
/* Bits of a word of /proc/PID/pagemap. */
#define HV_PM_PFRAME_BITS    55
#define HV_PM_SWAP_TYPE_BITS 5
#define HV_PM_SOFT_DIRTY     55
#define HV_PM_MMAP_EXCLUSIVE 56
#define HV_PM_UFFD_WP	     57 /* since Linux 5.16 */
#define HV_PM_GUARD_REGION   58 /* since Linux 6.15 */
#define HV_PM_FILE	     61
#define HV_PM_SWAP	     62
#define HV_PM_PRESENT	     63

/*
 * Swap types from here on are no swap areas but entries of the kernel's own (migration, poison,
 * markers of userfaultfd and guards): at most 9 of the 32 types, include/linux/swap.h@v6.18.
 */
#define HV_PM_SWAP_AREAS 23

/* PAGEMAP_SCAN, since Linux 6.7: include/uapi/linux/fs.h. */
#define HV_PAGE_IS_WPALLOWED  0x1
#define HV_PAGE_IS_WRITTEN    0x2
#define HV_PAGE_IS_FILE	      0x4
#define HV_PAGE_IS_PRESENT    0x8
#define HV_PAGE_IS_SWAPPED    0x10
#define HV_PAGE_IS_PFNZERO    0x20
#define HV_PAGE_IS_HUGE	      0x40
#define HV_PAGE_IS_SOFT_DIRTY 0x80
#define HV_PAGE_IS_GUARD      0x100 /* since Linux 6.15 */

#define HV_PM_SCAN_WP_MATCHING	 0x1
#define HV_PM_SCAN_CHECK_WPASYNC 0x2

struct hv_page_region {
	uint64_t start;
	uint64_t end;
	uint64_t categories;
};

struct hv_pm_scan_arg {
	uint64_t size;
	uint64_t flags;
	uint64_t start;
	uint64_t end;
	uint64_t walk_end;
	uint64_t vec;
	uint64_t vec_len;
	uint64_t max_pages;
	uint64_t category_inverted;
	uint64_t category_mask;
	uint64_t category_anyof_mask;
	uint64_t return_mask;
};

/* Bit numbers of a word of /proc/kpageflags: include/uapi/linux/kernel-page-flags.h. */
#define HV_KPF_LOCKED	     0
#define HV_KPF_ERROR	     1
#define HV_KPF_REFERENCED    2
#define HV_KPF_UPTODATE	     3
#define HV_KPF_DIRTY	     4
#define HV_KPF_LRU	     5
#define HV_KPF_ACTIVE	     6
#define HV_KPF_SLAB	     7
#define HV_KPF_WRITEBACK     8
#define HV_KPF_RECLAIM	     9
#define HV_KPF_BUDDY	     10
#define HV_KPF_MMAP	     11
#define HV_KPF_ANON	     12
#define HV_KPF_SWAPCACHE     13
#define HV_KPF_SWAPBACKED    14
#define HV_KPF_COMPOUND_HEAD 15
#define HV_KPF_COMPOUND_TAIL 16
#define HV_KPF_HUGE	     17
#define HV_KPF_UNEVICTABLE   18
#define HV_KPF_HWPOISON	     19
#define HV_KPF_NOPAGE	     20
#define HV_KPF_KSM	     21
#define HV_KPF_THP	     22
#define HV_KPF_OFFLINE	     23
#define HV_KPF_ZERO_PAGE     24
#define HV_KPF_IDLE	     25
#define HV_KPF_PGTABLE	     26

/* NUMA policies: include/uapi/linux/mempolicy.h. */
#define HV_MPOL_DEFAULT	       0
#define HV_MPOL_PREFERRED      1
#define HV_MPOL_BIND	       2
#define HV_MPOL_INTERLEAVE     3
#define HV_MPOL_LOCAL	       4
#define HV_MPOL_PREFERRED_MANY 5 /* since Linux 5.15 */

#define HV_MPOL_F_NODE	  0x1
#define HV_MPOL_F_ADDR	  0x2
#define HV_MPOL_F_MEMS	  0x4 /* MPOL_F_MEMS_ALLOWED */
#define HV_MPOL_MF_STRICT 0x1
#define HV_MPOL_MF_MOVE	  0x2

/* How many pages of a range have which bit set. */
struct hv_page_counts {
	uint64_t present;
	uint64_t swapped; /* to a swap area */
	uint64_t marked;  /* swap entries that are the kernel's own: no memory and no swap */
	uint64_t file;	  /* present or swapped */
	uint64_t exclusive;
	uint64_t soft_dirty;
	uint64_t uffd_wp;
	uint64_t guard;
};

/*
 * Of the descriptor of a pagemap: the words of [address, address + size), and how many of them have
 * which bits.  -ESRCH where the process has gone or the range is past its addresses.
 */
int hv_pagemap_read(int fd, uint64_t address, uint64_t size, void *words);
int hv_pagemap_count(int fd, uint64_t address, uint64_t size, struct hv_page_counts *counts);
int hv_pagemap_scan(int fd, struct hv_pm_scan_arg *arg);

/*
 * The proportional set of a range, in bytes << 12: each page present divided by how often it is
 * mapped, as fs/proc/task_mmu.c does it.  `count_fd` is one of /proc/kpagecount.  -EPERM where the
 * pagemap hides page frame numbers.
 */
int64_t hv_pagemap_pss(int fd, int count_fd, uint64_t address, uint64_t size);

int hv_mincore(uint64_t address, uint64_t size, void *vec);

/* `maxnode` is the kernel's: one more than the bits of `nodes` that count. */
int hv_mbind(uint64_t address, uint64_t size, int mode, const uint64_t *nodes, uint64_t maxnode,
	     uint32_t flags);
int hv_get_mempolicy(int *mode, uint64_t *nodes, uint64_t maxnode, uint64_t address,
		     uint32_t flags);

/* The program break of this process. */
uint64_t hv_brk_current(void);

/* One change of the program break: what was asked for, and what the kernel answered. */
struct hv_brk_step {
	uint64_t before;
	uint64_t asked;
	uint64_t after;
	uint32_t below; /* whether the page of the last byte below the break is mapped now */
	uint32_t above; /* whether the first whole page above the break is */
};

/*
 * Moves the break of a child of fork(2), which then ends, by each of `increments`; fills `steps`.
 * Returns how many steps the child told of.
 */
int hv_brk_child(const int64_t *increments, uint32_t nr, struct hv_brk_step *steps);
