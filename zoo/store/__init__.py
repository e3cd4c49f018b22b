"""A folder of blocks that models share: equal nodes are kept once, under the hash of what they are.

store = zoo.store.Store("blocks")
store.add("runs/first")                       # nodes that are there already are not written again
store.get("first", "back")                    # the same files, bit for bit
print(zoo.store.compare(store.read("first"), zoo.store.read_saved("runs/second")))
"""

from zoo.store.compare import Comparison, compare
from zoo.store.merge import Merged, merge
from zoo.store.nodes import Saved, StoredNode, read_saved
from zoo.store.stitch import Source, Stitched, fit
from zoo.store.store import Added, Store

__all__ = [
    "Added", "Comparison", "Merged", "Saved", "Source", "Stitched", "Store", "StoredNode", "compare", "fit", "merge",
    "read_saved",
]  # fmt: skip
