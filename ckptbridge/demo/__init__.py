"""`ckptbridge demo`: the main job on a small real model, every number shown. See `story.run_demo`."""
