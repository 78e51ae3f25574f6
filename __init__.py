"""SpatialAlign: the door ComfyUI comes through. Nothing is imported until it asks for the nodes."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():  # type: ignore[no-untyped-def]  # its type would be an import
    """The extension with all nodes."""
    try:
        from .nodes.extension import SpatialAlignExtension
    except Exception:
        import logging

        # ComfyUI logs one line only, and without the place where it happened.
        logging.getLogger("spatialalign").exception("SpatialAlign's nodes could not be imported from %s", __name__)
        raise
    return SpatialAlignExtension()
