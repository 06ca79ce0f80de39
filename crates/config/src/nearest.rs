//! "Did you mean": the known word that is closest to one that is not.

/// The candidate that differs least from `word`, letter case aside: by at most a third of its letters, but by one in any
/// case. Swapped neighbours count as one difference. Of equally close ones the first.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // nobody's key is longer, and the work grows with the square
    const LETTERS_MAX: usize = 64;
    let word: Vec<char> = word.to_lowercase().chars().take(LETTERS_MAX).collect();
    let far = (word.len() / 3).max(1);
    let measured = candidates.into_iter().map(|candidate| {
        let letters: Vec<char> = candidate.to_lowercase().chars().take(LETTERS_MAX).collect();
        (distance(&word, &letters), candidate)
    });
    measured.filter(|(distance, _)| *distance <= far).min_by_key(|(distance, _)| *distance).map(|(_, found)| found)
}

/// Letters to insert, remove, replace or swap with their neighbour.
fn distance(a: &[char], b: &[char]) -> usize {
    let mut before_last: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for (i, &x) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, &y) in b.iter().enumerate() {
            let at = |row: &[usize], column: usize| row.get(column).copied().unwrap_or(usize::MAX - 1);
            let mut best = at(&last, j) + usize::from(x != y);
            best = best.min(at(&last, j + 1) + 1).min(at(&row, j) + 1);
            let swapped = i > 0 && j > 0 && a.get(i - 1) == Some(&y) && b.get(j - 1) == Some(&x);
            if swapped {
                best = best.min(at(&before_last, j - 1) + 1);
            }
            row.push(best);
        }
        before_last = std::mem::replace(&mut last, row);
    }
    last.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_was_meant() {
        let known = ["bind_address", "bind_port", "ca_ttl", "trust_domain"];
        for (word, meant) in [
            ("bind_prot", Some("bind_port")),
            ("trustdomain", Some("trust_domain")),
            ("Bind_Adress", Some("bind_address")),
            ("ca_tl", Some("ca_ttl")),
            ("ttl", None),
            ("", None),
            ("something_else", None),
        ] {
            assert_eq!(nearest(word, known), meant, "{word}");
        }
        assert_eq!(nearest(&"x".repeat(100_000), known), None);
    }
}
