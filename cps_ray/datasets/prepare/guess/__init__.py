"""What a folder of strangers' photos and masks seems to be: `layout` pairs files, `pixels` looks into them, `texts` writes it down."""
