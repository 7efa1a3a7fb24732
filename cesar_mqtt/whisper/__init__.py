"""From samples to a transcript. faster-whisper, CTranslate2 and huggingface_hub stop here."""
