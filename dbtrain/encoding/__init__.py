"""Pictures and captions turned into what `data.source=encoded` reads, by encoders that lie on disk."""
