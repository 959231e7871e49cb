"""Callbacks for training libraries; each module needs its library: ``pip install secorder[lightning]`` and so on."""
