"""The engine inside of other systems' workers: Ray Data and Spark."""
