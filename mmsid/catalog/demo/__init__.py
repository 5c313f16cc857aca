"""Generated demo catalogue: ads drawn with Pillow, whose facts, users and best achievable ranking are known."""

from mmsid.catalog.demo.write import write_demo_catalog

__all__ = ["write_demo_catalog"]
