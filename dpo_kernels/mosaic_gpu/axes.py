"""Names of the kernels' own axes, which no mesh of devices has.

Where a mesh around a kernel has an axis of the same name, `lax.axis_index` in the
kernel is the device's index along that one, and nobody says so.
"""

_OURS = "dpo_kernels."

SM = _OURS + "sm"  # streaming multiprocessors, or clusters of them
CLUSTER = _OURS + "cluster"  # blocks of one
WARPGROUP = _OURS + "warpgroup"  # of a block
SEQUENCE = _OURS + "sequence"  # of `sequence_sums`
TOKENS = _OURS + "tokens"  # blocks of them
