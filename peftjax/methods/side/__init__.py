"""Networks beside a backbone that no gradient goes through."""
