"""From a captured graph to a step that runs: passes, regions, programs."""
