UPDATE registered_entries SET revision_number = NULL, store_svid = NULL, hint = NULL, jwt_svid_ttl = NULL WHERE entry_id = 'old';
UPDATE attested_node_entries SET new_serial_number = NULL, new_expires_at = NULL, can_reattest = NULL WHERE spiffe_id LIKE '%/old';
