"""What a run spent its time on: recorded, judged, and shown."""
