"""From samples to a transcript; faster-whisper stops here."""
