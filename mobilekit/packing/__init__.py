"""Deep Compression's storage: weights that share values, Huffman codes, and packages that restore a model bit for bit.

After Han, Mao, Dally 2016, "Deep Compression" (arXiv:1510.00149); `docs/packing.md` describes the file format.
"""

from mobilekit.packing.archive import Packed, Unpacked, pack, unpack
from mobilekit.packing.clustering import Codebook, cluster

__all__ = ["Codebook", "Packed", "Unpacked", "cluster", "pack", "unpack"]
