"""The main face of a clip as aligned crops, by the detector that faces.detector names."""

from collections.abc import Callable
from functools import partial

from stages.engine.errors import NO_FILE, PipelineError, Skip
from stages.engine.manifest import Segment, Source
from stages.engine.params import Faces, Params
from stages.engine.store import Row
from stages.media import centerface, openface

OPENFACE_SHARE = 0.9  # of the worker's time limit: OpenFace is stopped before the worker that waits for it


def faces_decoder(p: Params) -> Callable[[str, Source], Row]:
    """As the stage crop_faces and predict crop a clip's face: JPEG, with frame indices and confidences.

    Raises PipelineError where the detector needs a binary that is not there.
    """
    if p.faces.detector == "openface":
        openface.find_binary(p.faces.openface_binary)  # before any clip: a wrong path is not the clips' fault
    return partial(_faces_row, faces=p.faces, time_limit=OPENFACE_SHARE * p.runtime.clip_timeout_seconds)


def _faces_row(clip_id: str, path: Source, faces: Faces, time_limit: float) -> Row:
    options = (faces.stride, faces.size, faces.min_confidence, faces.quality)
    if faces.detector == "openface":
        if isinstance(path, Segment):
            raise PipelineError("faces.detector: found openface, which reads whole files, but clips of this corpus are "
                                "segments of files; expected centerface")
        if not path:
            raise Skip(NO_FILE)
        found = openface.crop_clip(path, *options, faces.openface_binary, time_limit)
    else:
        found = centerface.crop_clip(path, *options, faces.detect_every)
    crops, indices, confidences, note = found
    return Row(clip_id, values=crops, reason=note, items={"frame": indices, "confidence": confidences})
