"""Methods tomoe and disp: masks over the neurons of frozen FFNs, made by one trained network."""
