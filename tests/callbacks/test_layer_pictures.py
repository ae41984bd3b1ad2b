"""When the pictures of all layers are drawn."""

from __future__ import annotations

import itertools

from matent_callbacks import plot
from matent_callbacks.callbacks import layer_pictures
from matent_callbacks.callbacks.layer_pictures import LayerPictures, thinned


def test_a_long_run_goes_on_being_drawn_and_is_drawn_at_its_end(monkeypatch):
    for name in ("layer_profile", "layer_heatmap"):
        monkeypatch.setattr(plot, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(layer_pictures, "_MOST_RECORDS", 64)
    pictures, records, drawn = LayerPictures(["effective_rank"]), [], []
    layers = ("layer_00", "last")
    for step in range(1, 301):
        records = thinned([*records, {"step": step, "effective_rank/layer_00": 1.0, "effective_rank/last": 2.0}])
        assert len(records) <= 64
        if pictures.draw(records, layers):
            drawn.append(step)
    assert drawn[:6] == [2, 3, 4, 5, 7, 9]
    gaps = [later - earlier for earlier, later in itertools.pairwise(drawn)]
    assert max(gaps) <= 16
    assert len(drawn) < 50
    end = {"step": 301, "effective_rank/layer_00": 1.0, "effective_rank/last": 2.0}
    assert pictures.draw([*records, end], layers, last=True)
    assert not pictures.draw([*records, end], layers, last=True)


def test_the_change_is_below_the_values_and_drift_has_a_picture_where_it_is_logged():
    layers = [*(f"layer_{i:02d}" for i in range(30)), "last"]
    values = {f"text/{m}/{n}": 1.0 + i for i, n in enumerate(layers) for m in ("effective_rank", "drift", "top_share")}
    pictures = LayerPictures(["top_share", "effective_rank"], ["text/"])
    assert pictures.shown(values) == {key: value for key, value in values.items() if "top_share" not in key}
    records = [{"step": step, **pictures.shown(values)} for step in (1, 2)]
    one = LayerPictures(["effective_rank"], ["text/"]).draw(records[:1], layers, last=True)
    two = pictures.draw(records, layers)
    kinds = ("effective_rank_profile", "effective_rank_heatmap", "drift_profile")
    assert list(one) == list(two) == [f"text/layers/{kind}" for kind in kinds]
    assert [pixels.shape[:2] for pixels in one.values()] == [(400, 700)] * 3
    assert [pixels.shape[:2] for pixels in two.values()] == [(400, 700), (800, 700), (400, 700)]
