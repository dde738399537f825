"""The plot of all schedules: a panel for each, and a picture on disk."""

import plot_schedules

from adabatch import schedules


def test_every_schedule_is_drawn():
    drawn = {
        type(build(plot_schedules.place())).__name__
        for build in plot_schedules.BATCH_SIZES.values()}
    known = {
        name for name in schedules.__all__ if isinstance(getattr(schedules, name), type)
        and issubclass(getattr(schedules, name), schedules.BSScheduler)}
    assert drawn == known - {"BSScheduler"}


def test_the_picture_is_written(tmp_path):
    plot_schedules.main(["--steps", "30", "--out", str(tmp_path / "deep" / "schedules.png")])
    assert (tmp_path / "deep" / "schedules.png").stat().st_size > 50_000
