"""Ours beside the peer: same work, same machine, interleaved."""
