from tools.benchmark.augmentations import rows


def test_each_way_has_a_row() -> None:
    found = {row["what"]: row["ms_per_image"] for row in rows(size=24, rounds=1)}
    assert {"flip", "hue", "Mixup", "CutMix"} <= found.keys()
    shown = {what: time for what, time in found.items() if what.startswith("held out")}
    assert len(shown) == 4 and all(time > 0 for time in shown.values())
