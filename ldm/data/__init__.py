"""Data sets that answer alike: items {"image", "caption", "key"}, and caption, identity, fingerprint, report."""
