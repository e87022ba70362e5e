"""Guest RAM without copying: a read-only view, a writable one whose pages count as written, and what they keep open.

Prints:

    b'hello'
    [range(1, 2)]
    True
    b'HELLO'
    BufferError
"""

from __future__ import annotations

import hvmodel as hv

m = hv.Machine(ram="1M")
m.ram.take_host_dirty()
m.write(0x1000, b"hello")  # page 1
view = m.view(0x1000, 5)
print(bytes(view))
print(m.ram.take_host_dirty())

with m.writable(0x2000, 0x1000) as window:
    window[:5] = b"HELLO"
    # KVM's dirty log does not see what the host writes: an open window counts as written.
    print(m.ram.host_dirty() == [range(2, 3)])
print(m.read(0x2000, 5))

try:
    m.close()  # not under a live view: nobody gets to touch memory that is gone
except BufferError:
    print("BufferError")
view.release()
del view, window
m.close()
