"""A stand-in for the part of ComfyUI's engine that describing the nodes asks for."""
