"""The public contract as models: topics, payloads, parsing of untrusted messages, schemas. No I/O."""
