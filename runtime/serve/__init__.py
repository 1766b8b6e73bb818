"""`edgeclip serve`: what cameras show, in the browser and over HTTP."""
