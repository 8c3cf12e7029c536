"""Versions of the machinery's effect on results.

stages/engine is neither a dependency of a stage in dvc.yaml nor part of a fingerprint: an error message reruns nothing.
Where a change in it does change what a stage writes, raise the constant here that dvc.yaml lists for that stage: DVC
then reruns it, and its finished parts are not used again.
"""

STORE = 1  # store.py: the bytes of a shard, or which clips share one (work.py)
DECODING = 1  # per_clip.py: what a media stage records
ENCODING = 1  # encoding.py: which clips share a batch
