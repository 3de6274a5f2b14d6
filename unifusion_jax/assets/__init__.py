"""Small real checkpoints that come with the package; `bundled:demo/encoder` in a config names one."""
