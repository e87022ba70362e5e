"""Makes random public calls: `random_calls.py SEED NUMBER` prints calls, refusals, kinds of errors.  Dies where the
library lets it die; test_random_calls.py looks at how it ended."""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections import Counter

sys.path.insert(0, os.getcwd())

import hvmodel as hv
from hvmodel.host import Mapping, MemFd, available_memory, seal_order, who_maps
from hvmodel.host.advice import ADVICE

PAGE = 4096
PAGES = 12
SIZE = PAGES * PAGE

choice, randrange = random.choice, random.randrange

numbers = [
    0,
    1,
    -1,
    PAGE,
    -PAGE,
    SIZE,
    SIZE - 1,
    SIZE + PAGE,
    1 << 31,
    1 << 47,
    1 << 63,
    (1 << 64) - PAGE,
    1 << 64,
    None,
    "4K",
    2.0,
    True,
]
advice = [word for word in ADVICE if word not in ("hugepage", "collapse")] + ["", 5]


def number() -> object:
    """An offset or a size: mostly whole pages inside, often near an edge, at times nonsense."""
    draw = random.random()
    if draw < 0.6:
        return randrange(PAGES + 1) * PAGE
    return randrange(SIZE + 2) if draw < 0.85 else choice(numbers)


memfds: list[MemFd] = []
mappings: list[Mapping] = []
kept: list[object] = []


def touch() -> int:
    """Reads every view that is out: what was handed out must never fault."""
    total = 0
    for view in kept:
        with contextlib.suppress(ValueError):  # released
            total += sum(bytes(view)[:: PAGE // 2])
            if not view.readonly and len(view):
                view[len(view) - 1] = 1
    return total


def new_memfd() -> None:
    arguments = {
        "seals": choice([0, 0, 2, 2, 6, 7, 0x10, 0x12, 0x20]),
        "exec": choice([None, None, False, True]),
        "allow_sealing": choice([True, True, True, False]),
        "hugetlb": choice([False] * 9 + [True]),
    }
    memfd = MemFd("random", choice([SIZE, SIZE, PAGE, "2M", number()]), **arguments)
    memfds.append(memfd)
    if len(memfds) > 4:
        memfds.pop(randrange(len(memfds) - 1)).close()


def new_mapping() -> None:
    memfd = choice([*memfds, None])
    source = choice([memfd, memfd, memfd, -1, 0, 99]) if memfd is None or random.random() < 0.1 else memfd
    if memfd is not None and random.random() < 0.15:
        source = memfd.fd
    mapping = Mapping(
        source,
        choice([SIZE, SIZE, SIZE, 2 * SIZE, "2M", number()]),
        offset=choice([0, 0, 0, PAGE, number()]),
        prot=choice([3, 3, 3, 3, 1, 0, 2, 7, 5]),
        shared=choice([True, True, False]),
        align=choice([None, None, PAGE, "2M", number()]),
        noreserve=choice([False, False, True]),
        sync=random.random() < 0.05,
        written=choice([None, lambda offset, size: None]),
    )
    mappings.append(mapping)
    if len(mappings) > 5:
        old = mappings.pop(randrange(len(mappings) - 1))
        with contextlib.suppress(hv.HvError):
            old.close()


def keep(view: object) -> None:
    kept.append(view)
    if len(kept) > 6:
        del kept[randrange(len(kept))]


def writable(mapping: Mapping) -> None:
    with mapping.writable(number(), number()) as view:
        view[:] = b"\1" * len(view)
        if random.random() < 0.3:
            keep(view[: len(view) // 2])


CALLS = {
    "memfd": (new_memfd, 2),
    "mapping": (new_mapping, 4),
    "resize": (lambda: choice(memfds).resize(choice([PAGE, SIZE // 2 & -PAGE, SIZE, number()])), 3),
    "truncate": (lambda: os.ftruncate(choice(memfds).fd, randrange(2 * PAGES) * PAGE), 2),
    "seal": (lambda: choice(memfds).add_seals(choice([2, 2, 4, 8, 0x10, 0x40])), 1),
    "close memfd": (lambda: memfds.pop(randrange(len(memfds))).close(), 0.5),
    "from_fd": (lambda: MemFd.from_fd(choice([choice(memfds).fd, 0, 99, -1, number()]), size=number()).close(), 1),
    "order": (lambda: seal_order(randrange(66), have=randrange(64)), 0.5),
    "who": (lambda: who_maps(choice(memfds).fd), 0.05),
    "room": (available_memory, 0.05),
    "read": (lambda: choice(mappings).read(number(), number()), 8),
    "write": (lambda: choice(mappings).write(number(), choice([b"", b"\2" * randrange(3 * PAGE), None])), 8),
    "view": (lambda: keep(choice(mappings).view(number(), number())), 6),
    "writable": (lambda: writable(choice(mappings)), 4),
    "drop": (kept.clear, 2),
    "protect": (lambda: choice(mappings).protect(number(), number(), choice([0, 1, 2, 3, 3, 3, 7, 8])), 8),
    "prot_at": (lambda: choice(mappings).prot_at(number()), 1),
    "advise": (lambda: choice(mappings).advise(choice(advice), number(), number()), 10),
    "guard": (lambda: choice(mappings).advise(choice(["guard_install", "guard_remove"]), number(), number()), 4),
    "discard": (lambda: choice(mappings).discard(number(), number()), 4),
    "sync": (lambda: choice(mappings).sync(number(), number()), 1),
    "populate": (
        lambda: choice(mappings).populate(
            number(),
            number(),
            write=choice([True, False]),
            threads=choice([1, 1, 1, 2, 0]),
            progress=choice([None, lambda *_: None]),
        ),
        3,
    ),
    "pin": (lambda: (choice(mappings).pin("random"), choice(mappings).unpin("random")), 0.5),
    "close": (lambda: choice(mappings).close(), 1),
    "bar": (lambda: (lambda m: m._allow(m._forbid(number(), number(), "random")))(choice(mappings)), 2),
}


def main(seed: int, number: int) -> None:
    random.seed(seed)
    refused: Counter[str] = Counter()
    names, weights = list(CALLS), [weight for _, weight in CALLS.values()]
    new_memfd_first = MemFd("first", SIZE, seals=2)
    memfds.append(new_memfd_first)
    mappings.append(Mapping(new_memfd_first, SIZE))
    for _ in range(number):
        name = random.choices(names, weights)[0]
        if len(mappings) > 1 and random.random() < 0.2:
            mappings[:] = [each for each in mappings if not each.closed] or mappings[:1]
        if not memfds:
            memfds.append(MemFd("again", SIZE, seals=2))
        try:
            CALLS[name][0]()
        except (hv.HvError, BufferError) as error:
            refused[type(error).__name__] += 1
        except OSError:
            if name != "truncate":  # the one call here that is not ours
                raise
        touch()
    kept.clear()
    for mapping in mappings:
        with contextlib.suppress(hv.HvError):
            mapping.close()
    print(number, refused.total(), len(refused))
    print(dict(refused), file=sys.stderr)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
