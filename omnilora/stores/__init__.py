"""How base weights are held besides plain tensors. Importing this package registers its stores."""
