"""The public contract as models: bytes to a model or a `Refusal`, a model to bytes of at most a packet.

No I/O and no threads; neither paho nor TinyDB. A field that is not declared here is not part of the contract.
"""
