"""The pictures of the docs can be looked at on light and on dark pages."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.image import imread

from matent_callbacks.plot import training_overview
from tests.docs.fences import ROOT

# A white and a dark page, as mkdocs-material and GitHub have them.
PAGES = {"white": "#ffffff", "the dark of the site": "#1e2129", "the dark of GitHub": "#0d1117"}
LEFT_OUT = {"multimodal_captions"}  # a sheet of pictures that have their own background


def contrast(one, other):
    light = []
    for colour in (one, other):
        rgb = np.array(mpl.colors.to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        light.append(float(linear @ [0.2126, 0.7152, 0.0722]) + 0.05)
    return max(light) / min(light)


@pytest.mark.parametrize("name", sorted({p.stem for p in (ROOT / "docs").glob("*.png")} - LEFT_OUT))
def test_a_picture_has_no_background(name):
    pixels = imread(ROOT / f"docs/{name}.png")
    assert pixels.shape[-1] == 4
    edges = np.concatenate([pixels[[0, -1]].reshape(-1, 4), pixels[:, [0, -1]].reshape(-1, 4)])
    assert edges[:, 3].max() == 0


def test_text_in_the_style_of_the_docs_is_readable_on_every_page():
    records = [{"step": s, "loss": 3.0 - s, "effective_rank/last": 2.0, "matrix_entropy/last": 1.0} for s in (1, 2)]
    with mpl.rc_context(fname=str(ROOT / "docs/rendering/matplotlibrc")):
        mpl.use("agg")
        figure = training_overview(records, title="run")
        figure.canvas.draw()
        assert figure.get_facecolor()[3] == figure.axes[0].get_facecolor()[3] == 0
        grey = {mpl.colors.to_hex(text.get_color()) for text in figure.findobj(mpl.text.Text) if text.get_text()}
    assert len(grey) > 1  # an axis has the colour of its curve
    for page in PAGES.values():
        assert min(contrast(colour, page) for colour in grey) >= 3
