"""Images of the platform: recipes become squashfs layers, layers become image manifests.

`recipe.py` reads what is wanted, `plan.py` decides which layers that means and how each is named (pure), `machine.py`
knows the settings of the machine that builds (mirrors, proxies, CA bundle), `workshop.py` mounts and runs things,
`layers.py` makes the tree of each kind of layer, `store.py` is the cache on disk, `build.py` brings them together.
"""
