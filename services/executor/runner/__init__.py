"""One interface, `Runner.step(batch) -> result`, and the devices behind it."""
