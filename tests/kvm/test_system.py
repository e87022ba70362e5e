"""Kvm: opening /dev/kvm and what stands in the way, a descriptor from somebody else, what the system can be asked."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hvmodel._ffi import ffi, lib
from hvmodel.errors import ArgumentError, ArgumentTypeError, ClosedError, HostError, KvmError, PartialError
from hvmodel.kvm import Kvm, system, vendor_module
from tests.host.held import nothing_leaks
from tests.need import need

ROOT = Path(__file__).parents[2]


def child(script: str, *args: str, pass_fds: tuple[int, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run a script of its own; what it prints is compared by the test."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, pass_fds=pass_fds, timeout=60, check=False)


# ---- opening ----


def test_a_missing_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kvm"
    for loaded, cure in ((None, "modprobe"), ("kvm_amd", "--device")):
        monkeypatch.setattr(system, "vendor_module", lambda loaded=loaded: loaded)
        with nothing_leaks(), pytest.raises(HostError) as refused:
            Kvm(path)
        assert (refused.value.errno, refused.value.call, refused.value.field) == (errno.ENOENT, "open", "path")
        assert str(path) in str(refused.value)
        assert cure in str(refused.value)


@pytest.mark.parametrize(
    ("err", "cure"),
    [
        (errno.EACCES, "join group"),
        (errno.EPERM, "join group"),
        (errno.ENODEV, "load kvm_intel or kvm_amd"),
        (errno.ENXIO, "load kvm_intel or kvm_amd"),
        (errno.EBUSY, "another hypervisor"),
    ],
)
def test_a_device_that_cannot_be_opened(err: int, cure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What only other hosts answer is put into os.open's mouth.
    path = tmp_path / "kvm"
    path.touch(mode=0o660)
    path.chmod(0o660)

    def refuse(*args: object) -> int:
        raise OSError(err, os.strerror(err))

    monkeypatch.setattr(system.os, "open", refuse)
    with pytest.raises(HostError, match=cure) as refused:
        Kvm(path)
    assert refused.value.errno == err


def test_a_device_for_its_owner_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kvm"
    path.touch(mode=0o600)

    def refuse(*args: object) -> int:
        raise PermissionError(errno.EACCES, "")

    monkeypatch.setattr(system.os, "open", refuse)
    with pytest.raises(HostError, match=rf"chmod 660 {path}"):
        Kvm(path)


def test_files_that_are_not_kvm(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"x")
    with nothing_leaks():
        for path in ("/dev/null", "/dev/zero", plain, os.fspath(plain)):
            with pytest.raises(ArgumentError, match="not a KVM device"):
                Kvm(path)
        with pytest.raises(HostError) as refused:
            Kvm(tmp_path)
        assert refused.value.errno == errno.EISDIR
        for path in ("", "x" * 5000, "\0", b"/dev/kvm"):
            with pytest.raises((HostError, ArgumentError, ArgumentTypeError)):
                Kvm(path)
        for path in (None, 5, 1.5, [], True):
            with pytest.raises(ArgumentTypeError):
                Kvm(path)


def test_an_old_api(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        def __getattr__(self, name: str) -> object:
            return getattr(lib, name)

        def kvm_get_api_version(self, fd: int) -> int:
            return 11

    monkeypatch.setattr(system, "lib", Old())
    with nothing_leaks(), pytest.raises(ArgumentError, match="it speaks KVM API 11"):
        Kvm()


def test_the_vendor_module_is_loaded() -> None:
    need("kvm")
    name = vendor_module()
    assert name is not None
    assert Path("/sys/module", name).is_dir()


# ---- from_fd ----


def test_a_descriptor_from_somebody_else_stays_theirs(kvm: Kvm) -> None:
    theirs = os.open("/dev/kvm", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with Kvm.from_fd(theirs) as ours:
            assert ours.fd != theirs
            assert not os.get_inheritable(ours.fd)
            assert ours.api_version == 12
            with ours.create_vm() as vm:
                assert vm.kvm is ours
        assert os.fstat(theirs)
        assert ours.closed
    finally:
        os.close(theirs)


def test_descriptors_that_are_not_kvm(kvm: Kvm, tmp_path: Path) -> None:
    with nothing_leaks(), kvm.create_vm() as vm, (tmp_path / "x").open("w") as plain, open("/dev/null") as null:
        for file in (vm, plain, null):
            with pytest.raises(ArgumentError, match="not a KVM device"):
                Kvm.from_fd(file.fileno())
        for fd in (-1, 1 << 20, 1 << 31, 1 << 70, -(1 << 70)):
            with pytest.raises(HostError) as refused:
                Kvm.from_fd(fd)
            assert refused.value.errno == errno.EBADF
        for wrong in (None, "3", 3.0, True, [], null):
            with pytest.raises(ArgumentTypeError):
                Kvm.from_fd(wrong)


def test_an_unprivileged_process_with_a_descriptor_does_real_work(kvm: Kvm) -> None:
    # It may not open /dev/kvm, and says so; what it was handed is enough for a guest, irqchip, dirty log and all.
    need("root")
    done = child(
        """
        import errno, os, stat, sys
        import grp, threading  # what is imported late may be unreadable to nobody
        from hvmodel.errors import HostError
        from hvmodel.host import Mapping
        from hvmodel.kvm import Cap, IoOut, Kvm, Hlt
        import hvmodel.kvm.vcpu

        fd = int(sys.argv[1])
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        if not os.access("/dev/kvm", os.R_OK | os.W_OK):
            try:
                Kvm()
            except HostError as error:
                assert error.errno == errno.EACCES, error
                assert "no permission" in str(error), error
                assert "group" in str(error), error
            else:
                raise AssertionError("opened")
        with Kvm.from_fd(fd) as kvm, Mapping(None, "1M") as ram, kvm.create_vm() as vm:
            vm.set_tss_addr(0xFFFBD000)
            vm.set_user_memory_region(0, 0, ram, flags=1)
            ram.write(0x1000, bytes.fromhex("b041 a20090 e610 f4"))  # mov al, 'A'; mov [0x9000], al; out 0x10, al; hlt
            with vm.create_vcpu(0) as vcpu:
                vcpu.set_cpuid2(kvm.supported_cpuid_table())
                sregs = vcpu.sregs
                sregs.cs.base = sregs.cs.selector = 0
                vcpu.sregs = sregs
                regs = vcpu.regs
                regs.rip, regs.rflags = 0x1000, 2
                vcpu.regs = regs
                assert vcpu.run(10) == IoOut(0x10, 1, 1, b"A")
                assert vcpu.run(10) == Hlt()
            assert ram.read(0x9000, 1) == b"A"
            assert vm.get_dirty_log(0)[1] & 2
            assert kvm.check_extension(Cap.USER_MEMORY) == 1
        with Kvm.from_fd(fd) as kvm, kvm.create_vm() as vm:
            vm.create_irqchip()
            vm.irq_line(4, 1)
            assert vm.get_irqchip(0).chip.pic.irr == 16
        print("ok", os.getuid(), os.geteuid())
        """,
        str(kvm.fd),
        pass_fds=(kvm.fd,),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok 65534 65534\n", ""), done.stderr


# ---- asking ----


def test_types_of_vms(kvm: Kvm) -> None:
    with pytest.raises(KvmError) as refused:
        kvm.create_vm(31)
    assert (refused.value.errno, refused.value.field, refused.value.value) == (errno.EINVAL, "type", 31)
    for type in (-1, 1 << 64, "0", None, 1.0, True):
        with pytest.raises((ArgumentError, ArgumentTypeError)):
            kvm.create_vm(type)


def test_a_vm_is_made_though_signals_come_in(kvm: Kvm) -> None:
    # The kernel gives up (EINTR) while any signal is pending; so would every other VM in this storm.
    old = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        for _ in range(100):
            with kvm.create_vm() as vm:
                vm.create_irqchip()
                vm.create_vcpu(0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_capabilities_by_number(kvm: Kvm, vm: object) -> None:
    for owner in (kvm, vm):
        for cap in (-1, 1 << 32, "3", None, 3.0, True):
            with pytest.raises((ArgumentError, ArgumentTypeError)):
                owner.check_extension(cap)


def test_a_table_of_cpuid_can_be_set_as_it_comes(kvm: Kvm) -> None:
    table = kvm.supported_cpuid_table()
    assert ffi.typeof(table) == ffi.typeof("struct kvm_cpuid2 *")
    assert table.nent == len(kvm.supported_cpuid()) <= 256
    with kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        vcpu.set_cpuid2(table)
        # A vendor module may drop leaves of features that it does not give to guests.
        kept = {(entry.function, entry.index) for entry in vcpu.get_cpuid2()}
        assert kept <= {(entry.function, entry.index) for entry in kvm.supported_cpuid()}
        assert len(kept) > table.nent // 2


def test_a_feature_msr_that_is_none_is_named(kvm: Kvm) -> None:
    known = kvm.msr_feature_index_list()
    with pytest.raises(PartialError) as refused:
        kvm.get_feature_msrs([*known, 0x12345678, *known])
    error = refused.value
    assert (error.done, error.requested, error.first_failed) == (len(known), 2 * len(known) + 1, 0x12345678)
    assert kvm.get_feature_msrs([]) == {}


def test_a_closed_system_says_so(kvm: Kvm) -> None:
    closed = Kvm()
    closed.close()
    for ask in (
        lambda: closed.api_version,
        lambda: closed.vcpu_mmap_size,
        lambda: closed.check_extension(0),
        closed.create_vm,
        closed.supported_cpuid,
        closed.supported_cpuid_table,
        closed.emulated_cpuid,
        closed.msr_index_list,
        closed.msr_feature_index_list,
        lambda: closed.get_feature_msrs([1]),
    ):
        with pytest.raises(ClosedError):
            ask()


@pytest.mark.parametrize(
    ("modules", "maker", "found"),
    [
        (["kvm", "kvm_amd", "kvm_intel"], "GenuineIntel", "kvm_intel"),
        (["kvm", "kvm_amd", "kvm_intel"], "AuthenticAMD", "kvm_amd"),
        (["kvm", "kvm_amd"], "GenuineIntel", "kvm_amd"),
        (["kvm", "kvm_pvm"], "GenuineIntel", "kvm_pvm"),
        (["kvm"], "GenuineIntel", None),
    ],
)
def test_the_vendor_module_is_that_of_the_processors_maker(
    monkeypatch: pytest.MonkeyPatch, modules: list[str], maker: str, found: str | None
) -> None:
    monkeypatch.setattr(system, "_maker", lambda: maker)
    monkeypatch.setattr(system.os, "listdir", lambda _: modules)
    assert vendor_module() == found


def test_the_maker_is_that_of_cpuid() -> None:
    text = Path("/proc/cpuinfo").read_text()
    assert f"vendor_id\t: {system._maker()}\n" in text
