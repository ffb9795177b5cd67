"""The buffers of Ascend's torch extension `cann_ops_transformer`: expert-parallel calls in DeepEP's manner (§15, §16).

`MoeDistributeBuffer` is dispatch and combine of Atlas A3 behind an object that holds the group; `ElasticBuffer` sends a
token once to a rank, whatever number of its experts live there; `CommContextManager` makes the contexts of V5 (§2.18).
Names, arguments and results are upstream's.
"""

from evenmoe.ascend.cann_ops_transformer.comm_context import CommContextManager
from evenmoe.ascend.cann_ops_transformer.deep_ep import MoeDistributeBuffer
from evenmoe.ascend.cann_ops_transformer.elastic_buffer import ElasticBuffer
from evenmoe.ascend.cann_ops_transformer.ep_handle import EPHandle

__all__ = ["CommContextManager", "EPHandle", "ElasticBuffer", "MoeDistributeBuffer"]
