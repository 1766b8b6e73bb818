"""Has schemathesis send real pictures where a picture is asked for (see test_serve_schema.py)."""

import io

import schemathesis
from hypothesis import strategies as st
from PIL import Image


def picture(size: tuple[int, int], kind: str, level: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (level, 80, 120)).save(content, kind)
    return content.getvalue()


side = st.integers(1, 64)
pictures = st.builds(
    picture, st.tuples(side, side), st.sampled_from(("PNG", "JPEG", "BMP")), st.integers(0, 255)
)
for kind in ("image/*", "application/octet-stream"):
    schemathesis.openapi.media_type(kind, pictures)
