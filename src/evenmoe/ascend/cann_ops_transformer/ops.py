"""The same names where upstream has them, too: `from cann_ops_transformer.ops import MoeDistributeBuffer`."""

from evenmoe.ascend.cann_ops_transformer import CommContextManager, ElasticBuffer, EPHandle, MoeDistributeBuffer

__all__ = ["CommContextManager", "EPHandle", "ElasticBuffer", "MoeDistributeBuffer"]
