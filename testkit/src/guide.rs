//! Guides that tests follow word by word.

/// A fenced block of a guide that is not output.
pub struct Step {
    /// What stands behind the fence: the kind of text, then words such as `on=HOST,HOST`.
    pub info: Vec<&'static str>,
    /// What is between the fences.
    pub text: &'static str,
    /// What the guide says that it prints: the block of kind `text` that follows.
    pub says: &'static str,
}

impl Step {
    /// Whether this word stands behind the fence.
    pub fn is(&self, word: &str) -> bool {
        self.info.contains(&word)
    }

    /// The rest of the word behind the fence that begins so.
    pub fn value(&self, name: &str) -> &'static str {
        let value = self.info.iter().find_map(|word| word.strip_prefix(name));
        value.unwrap_or_else(|| panic!("no {name} in {:?}", self.info))
    }
}

/// The blocks of a guide, in their order.
pub fn steps(guide: &'static str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for fence in guide.split("\n```").skip(1).step_by(2) {
        let (info, text) = fence.split_once('\n').expect("a fence has a first line");
        match info {
            "text" => steps.last_mut().expect("a block before").says = text,
            _ => steps.push(Step { info: info.split(' ').collect(), text, says: "" }),
        }
    }
    steps
}
