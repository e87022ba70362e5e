"""Makes random public calls around UserFaultFd in two threads: `random_faults.py SEED NUMBER` prints calls, refusals,
kinds of errors.  Ends with a traceback of all threads if they wait for ever; test_random_calls.py looks at it."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import sys
import threading
from collections import Counter

sys.path.insert(0, os.getcwd())

import hvmodel as hv
from hvmodel.host import F_SEAL_SHRINK, Mapping, MemFd, PageMap, UserFaultFd, account, mincore
from hvmodel.host.faults import Fault

PAGE = 4096
PAGES = 12
SIZE = PAGES * PAGE
MODES = ["missing", "minor", "wp", "wp-async", ["missing", "wp"], ["missing", "minor", "wp"]]

choice, randrange = random.choice, random.randrange

mappings: list[Mapping] = []
uffds: list[UserFaultFd] = []
kept: list[memoryview] = []
refused: Counter[str] = Counter()


def offset() -> int:
    return choice([randrange(PAGES // 2) * PAGE] * 6 + [0, 0, 0, randrange(SIZE), -PAGE, 1 << 64, SIZE])


def size() -> int | None:
    return choice([randrange(1, PAGES // 2) * PAGE] * 6 + [PAGE, PAGE, None, None, randrange(SIZE), 0, 1 << 63])


def memory() -> Mapping:
    return choice(mappings)


def uffd() -> UserFaultFd:
    return choice(uffds)


def new_mapping() -> None:
    memfd = choice([None, None, MemFd("random", SIZE, seals=F_SEAL_SHRINK), MemFd("random", SIZE)])
    mappings.append(Mapping(memfd, SIZE, shared=choice([True, False])))
    if len(mappings) > 4:
        mappings.pop(0).close()


def new_uffd() -> None:
    often = [False] * 4
    wp_async, sigbus, user_mode_only = (choice([*often, True]) for _ in range(3))
    uffds.append(UserFaultFd(patience=0.01, wp_async=wp_async, sigbus=sigbus, user_mode_only=user_mode_only))
    if len(uffds) > 3:
        uffds.pop(0).close()


def handler(fault: Fault) -> bytes | None:
    draw = randrange(6)
    if draw == 0:
        raise ValueError("of the handler")
    if draw == 1:
        return None
    if fault.kind == "missing":
        return bytes(PAGE * choice([1, 1, 2, PAGES]))
    for each in uffds:
        with contextlib.suppress(hv.HvError):
            if fault.kind == "minor":
                each.continue_(fault.mapping, fault.page, PAGE)
            else:
                each.writeprotect(fault.mapping, fault.page, PAGE, protect=False)
    return None


def keep() -> None:
    kept.append(memory().view(offset(), size()))
    if len(kept) > 4:
        del kept[0]


def source() -> object:
    return choice([None, None, memory(), memory().source, 0, 99])


CALLS = [
    new_mapping,
    new_uffd,
    keep,
    kept.clear,
    lambda: uffd().register(memory(), offset(), size(), choice(MODES)),
    lambda: uffd().register(memory(), mode=choice(MODES)),
    lambda: uffd().unregister(memory()),
    lambda: uffd().unregister(memory(), offset(), size()),
    lambda: uffd().serve(handler),
    lambda: uffd().serve(handler),
    lambda: uffd().serve_native(source()),
    lambda: uffd().stop(),
    lambda: randrange(8) or uffd().close(),
    lambda: randrange(8) or memory().close(),
    lambda: uffd().copy(memory(), offset(), bytes(PAGE * randrange(3)), wp=choice([True, False])),
    lambda: uffd().copy_from(memory(), offset(), memory(), offset(), PAGE),
    lambda: uffd().zeropage(memory(), offset(), size() or PAGE),
    lambda: uffd().continue_(memory(), offset(), size() or PAGE),
    lambda: uffd().poison(memory(), offset(), PAGE),
    lambda: uffd().move(memory(), offset(), memory(), offset(), PAGE, holes=choice([True, False])),
    lambda: uffd().writeprotect(memory(), offset(), size(), protect=choice([True, False])),
    lambda: uffd().wake(memory(), offset(), size()),
    lambda: uffd().take_written(memory()),
    lambda: uffd().take_written(memory(), offset(), size()),
    lambda: memory().read(offset(), size()),
    lambda: memory().read(randrange(SIZE), 1),
    lambda: memory().write(randrange(SIZE), b"1"),
    lambda: memory().write(offset(), b"2" * randrange(3 * PAGE)),
    lambda: memory().protect(0, None, 3),
    lambda: memory().protect(offset(), size(), randrange(4)),
    lambda: memory().advise(choice(["guard_install", "guard_remove", "dontneed", "remove", "cold"]), offset(), size()),
    lambda: memory().discard(offset(), size()),
    lambda: memory().populate(offset(), size(), write=choice([True, False])),
    lambda: account(memory(), offset(), size()),
    lambda: mincore(memory().hva + offset(), size() or PAGE),
    lambda: PageMap().count(memory().hva, SIZE),
]


def run(number: int) -> None:
    for _ in range(number):
        try:
            choice(CALLS)()
        except (hv.HvError, BufferError) as error:
            refused[type(error).__name__] += 1
        except ValueError as error:
            if error.args != ("of the handler",):  # which `stop` and `close` raise
                raise
        except IndexError:
            pass  # the other thread has taken the last one
        mappings[:] = [each for each in mappings if not each.closed] or [Mapping(None, SIZE)]
        uffds[:] = [each for each in uffds if not each.closed] or [UserFaultFd(patience=0.01)]
        for view in kept:
            bytes(view)


def main(seed: int, number: int) -> None:
    random.seed(seed)
    faulthandler.enable()
    faulthandler.dump_traceback_later(600, exit=True)
    new_mapping(), new_uffd()
    other = threading.Thread(target=run, args=(number // 2,))
    other.start()
    run(number - number // 2)
    other.join()
    kept.clear()
    for each in [*uffds, *mappings]:
        with contextlib.suppress(Exception):
            each.close()
    print(number, refused.total(), len(refused))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
