"""Callbacks for training libraries; each module needs its library, and is loaded by name."""
