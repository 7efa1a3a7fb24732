"""Which field a producer means by a name that is no field. Pure; any thread may call it."""

from collections.abc import Collection, Mapping

from cesar_mqtt.errors import bare_name, nearest

_OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "audio_path": ("path", "file", "filename", "filepath", "audio", "audiofile", "input", "source", "src", "recording"),
    "audio_url": ("url", "uri", "link", "href", "fileurl", "mediaurl"),
    "audio_base64": ("base64", "b64", "data", "content", "payload", "bytes", "audiodata", "audiobytes"),
    "job_id": ("id", "job", "uuid", "requestid", "taskid", "correlationid"),
    "model_size": ("model", "modelname", "modelid", "size", "whispermodel"),
    "language": ("lang", "locale", "languagecode", "sourcelanguage"),
    "task": ("translate", "mode", "action"),
    "initial_prompt": ("prompt", "context", "promptprefix"),
    "hotwords": ("keywords", "phrases", "vocabulary", "bias"),
    "beam_size": ("beam", "beams", "numbeams", "beamwidth"),
    "temperature": ("temp", "temperatures"),
    "vad_filter": ("vad", "usevad", "silencefilter"),
    "word_timestamps": ("words", "wordlevel", "timestamps", "timestampgranularities"),
    "clip_timestamps": ("clip", "clips", "ranges"),
    "batch_size": ("batch", "batches"),
    "formats": ("format", "output", "outputs", "outputformat", "responseformat"),
    "stream": ("streaming", "live"),
    "expires_in": ("expires", "expiry", "expiration", "ttl", "timeout", "maxage"),
    "priority": ("prio", "urgency", "importance"),
    "multilingual": ("languages", "codeswitching", "mixedlanguages"),
    "audio_track": ("track", "stream_index", "channel"),
    "max_line_width": ("linewidth", "maxlinelength", "maxchars"),
    "max_line_count": ("linecount", "maxlines"),
    "diarize": ("diarization", "diarise", "speakers", "speakerlabels"),
    "min_speakers": ("minspeakercount", "minnumspeakers"),
    "max_speakers": ("maxspeakercount", "maxnumspeakers", "numspeakers"),
    "metadata": ("meta", "tags", "extra", "userdata", "custom"),
}
"""What other programs call the fields, as `bare_name` writes it."""

_MEANT = {bare_name(other): field for field, others in _OTHER_NAMES.items() for other in others}


def meant_field(name: str, fields: Collection[str]) -> str | None:
    """Return which of `fields` is meant by `name`, by another common name or a typing error; None: none is near."""
    meant = _MEANT.get(bare_name(name))
    return meant if meant in fields else nearest(name, fields)
