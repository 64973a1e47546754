"""What training sees: the drawn number of frames of a glance."""

import config as configuration
from config import Config
from harness.batches import Reading, glance_config


def test_the_most_frames_of_a_glance_are_drawn_anew_for_each_prompt():
    config = Config(max_frames=20, least_frames=12)
    drawn = [glance_config(config, (place, 0)).max_frames for place in range(300)]
    assert set(drawn) == set(range(12, 21))
    assert drawn == [glance_config(config, (place, 0)).max_frames for place in range(300)]
    assert drawn != [glance_config(config, (place, 1)).max_frames for place in range(300)]  # those of a redraw
    assert glance_config(Config(max_frames=20), (3, 0)).max_frames == 20


def test_views_of_training_have_as_many_frames_as_were_drawn(samples):
    config = Config(model=str(configuration.BUILT_IN), max_frames=10, least_frames=2, budget=40, v_min=4)
    frames = [len(Reading().view(samples[:1], (place, 0), config).view.clip.times) for place in range(8)]
    assert frames == [glance_config(config, (place, 0)).max_frames for place in range(8)]
    assert len(set(frames)) > 2
