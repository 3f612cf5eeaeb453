"""The inference engine behind ``freeze``: a captured graph, planned buffers, bound kernel calls."""
