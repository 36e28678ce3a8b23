"""Train the bundled model: `python -m dittocache.demo.train STAGE`."""
