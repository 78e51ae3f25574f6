"""A stand-in for ComfyUI's ``comfy_api``, for tests on machines without ComfyUI. It is never shipped to users.

It knows exactly what ComfyUI 0.8.0 knows and refuses the rest, so that a node which loads here loads there. The golden
``tests/golden/object_info.json``, made with the real package, holds it to that.
"""
