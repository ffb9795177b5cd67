"""Expert parallelism, recorded routing and replicas for models of Hugging Face transformers, 5.24 or newer.

`register` puts evenmoe among the `ep_implementation`s of `DistributedConfig`, `record` writes what a model's routers
choose, `place` gives a loaded model the replicas of a `Placement`. Importing this module imports torch and
transformers and changes nothing in them.
"""

from importlib.util import find_spec

if find_spec("transformers") is None or find_spec("transformers.distributed.expert_parallel") is None:
    raise ImportError(
        "evenmoe.integrations.transformers needs transformers 5.24 or newer, which is not installed; run "
        "`pip install 'evenmoe[transformers]'` with Python 3.11 or newer."
    )

from evenmoe.integrations.transformers.expert_modules import ExpertsOfLayer, experts_of
from evenmoe.integrations.transformers.implementation import register
from evenmoe.integrations.transformers.placing import place, placement_of
from evenmoe.integrations.transformers.recording import Recording, record
from evenmoe.integrations.transformers.training import reduce_replica_gradients

__all__ = [
    "ExpertsOfLayer",
    "Recording",
    "experts_of",
    "place",
    "placement_of",
    "record",
    "reduce_replica_gradients",
    "register",
]
