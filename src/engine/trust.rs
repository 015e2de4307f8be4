//! Which jobs are trusted, and what the others may do: read some volumes, and commit nothing, or to volumes of their own that
//! trusted jobs never read.
//!
//! Pure, save for the counting of room. The verdict is made once, when a fork is made, and stands in its record; a commit reads
//! nothing else.

use super::{Code, Engine, EngineError, ForkRequest, Result};
use crate::store::{self, Verdict};
use crate::volume::{self, Patterns};

/// The longest name of a scope that is kept as it is, in bytes.
const LONGEST: usize = 48;
/// The part of a volume's name behind which the scopes of untrusted jobs stand.
const UNTRUSTED: &str = "/untrusted/";
/// The room of all untrusted volumes together, if nothing else was said.
const LIMIT: u64 = 20 << 30;

/// What an administrator says of trust. Without any, everybody who may use the store is trusted.
#[derive(Clone, Debug)]
pub struct TrustPolicy {
    /// Users whose words about their jobs are believed.
    pub agents: Vec<u32>,
    /// A job for a branch or tag that is not protected, or not known to be, is untrusted.
    pub protected_only: bool,
    /// Untrusted jobs commit to volumes of their own scope; else they commit nothing.
    pub scopes: bool,
    /// Bytes that all untrusted volumes may take.
    pub limit: u64,
    readable: Patterns,
}

impl Default for TrustPolicy {
    fn default() -> TrustPolicy {
        TrustPolicy {
            agents: Vec::new(),
            protected_only: false,
            scopes: false,
            limit: LIMIT,
            readable: Patterns::default(),
        }
    }
}

/// What an agent says of a job. What it does not say is not known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct JobFacts {
    /// It was made for a change that comes from outside, such as a pull request of a repository's fork.
    pub foreign: Option<bool>,
    /// Its branch or tag is protected.
    pub protected: Option<bool>,
}

/// Who asks for something, as far as trust is concerned.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Asker {
    /// Root or the owner of the store.
    Administrator,
    /// An agent, in whose name these facts are told.
    Agent(JobFacts),
    /// A user of whom nothing is believed.
    User(u32),
}

impl TrustPolicy {
    /// Which volumes untrusted jobs may read: patterns in which `*` stands for anything but a slash, `**` for anything.
    ///
    /// # Errors
    /// What is wrong with a pattern.
    pub fn set_readable(&mut self, patterns: &[String]) -> std::result::Result<(), String> {
        self.readable = Patterns::of_names(patterns.iter().map(String::as_str))?;
        Ok(())
    }

    /// Whether untrusted jobs may read a volume of trusted ones.
    pub fn may_read(&self, volume: &str) -> bool {
        !is_untrusted(volume) && self.readable.name(volume.as_bytes(), false)
    }

    /// Whether a user of whom nothing is believed may read a volume: those of its own scope too.
    pub fn may_user_read(&self, volume: &str, uid: u32) -> bool {
        self.may_read(volume) || volume.ends_with(&format!("{UNTRUSTED}{}", of_user(uid)))
    }

    /// What a job may do. On doubt it is not trusted.
    pub fn judge(&self, asker: &Asker) -> Verdict {
        let trusted = match asker {
            Asker::Administrator => true,
            Asker::Agent(facts) => {
                facts.foreign == Some(false)
                    && (!self.protected_only || facts.protected == Some(true))
            }
            Asker::User(_) => false,
        };
        match (trusted, self.scopes) {
            (true, _) => Verdict::Trusted,
            (false, true) => Verdict::Scope,
            (false, false) => Verdict::Nothing,
        }
    }
}

/// The scope of an untrusted job. One that an agent names is one part of a volume's name, one of a user is two: whoever chooses
/// the name of a branch cannot choose that of a user's scope.
pub fn scope(asker: &Asker, named: Option<&str>, uid: u32) -> String {
    match (asker, named) {
        (Asker::Agent(_), Some(name)) => volume::legal_part(name, LONGEST),
        _ => of_user(uid),
    }
}

fn of_user(uid: u32) -> String {
    format!("uid/{uid}")
}

/// Whether a volume is one of untrusted jobs.
pub fn is_untrusted(volume: &str) -> bool {
    volume.contains(UNTRUSTED)
}

/// The volume of a version's or volume's name.
fn volume_of(text: &str) -> &str {
    text.split('@').next().unwrap_or_default()
}

/// Makes of what a job asks for what it gets.
///
/// # Errors
/// `Policy` for what it may not read.
pub(super) fn confine(
    policy: Option<&TrustPolicy>,
    verdict: Verdict,
    mut request: ForkRequest,
) -> Result<ForkRequest> {
    let Some(policy) = policy else {
        return Ok(request);
    };
    let refuse = |what: &str, hint: &str| {
        Err(EngineError::new(Code::Policy, what.to_owned()).hint(hint.to_owned()))
    };
    let named = request.from.iter().chain(&request.parents);
    let mut read = std::iter::once(&request.volume).chain(named);
    if verdict == Verdict::Trusted {
        return match read.find(|text| is_untrusted(volume_of(text))) {
            Some(text) => refuse(
                &format!("{text} holds what untrusted jobs wrote: no fork is made of it"),
                "`forkvol ls` and `forkvol export` show it",
            ),
            None => Ok(request),
        };
    }
    if let Some(text) = read.find(|text| !policy.may_read(volume_of(text))) {
        return refuse(
            &format!("an untrusted job may not read {text}"),
            "the owner of the store says in [trust] which volumes it may read",
        );
    }
    if verdict == Verdict::Scope {
        let trusted = std::mem::take(&mut request.volume);
        request.volume = format!("{trusted}{UNTRUSTED}{}", request.scope);
        // What its own scope has comes first, then what it may read of the trusted ones.
        request.parents.insert(0, trusted);
        request.size = request.size.min(policy.limit);
    }
    Ok(request)
}

impl Engine {
    /// Fails if a fork may not be committed because of whose it is. `taken` is what untrusted volumes take, if it was counted.
    pub(super) fn check_verdict(
        &self,
        record: &store::Fork,
        taken: &mut Option<u64>,
    ) -> Result<()> {
        match record.verdict {
            Verdict::Off | Verdict::Trusted => Ok(()),
            Verdict::Nothing => {
                let message = "an untrusted job commits nothing";
                Err(EngineError::new(Code::Policy, message)
                    .hint("the owner of the store may give untrusted jobs volumes of their own: [trust] commit = \"scope\""))
            }
            Verdict::Scope => {
                let Some(limit) = self.config.trust.as_ref().map(|policy| policy.limit) else {
                    return Ok(());
                };
                let taken = match *taken {
                    Some(taken) => taken,
                    None => *taken.insert(self.untrusted_bytes()?),
                };
                if taken < limit {
                    return Ok(());
                }
                let message = format!(
                    "the volumes of untrusted jobs take {taken} bytes, {limit} are allowed"
                );
                Err(EngineError::new(Code::NoSpace, message)
                    .hint("remove some of them, or raise `limit` in [trust]"))
            }
        }
    }

    /// What the volumes of untrusted jobs have brought, in bytes.
    fn untrusted_bytes(&self) -> Result<u64> {
        let mut bytes = 0;
        for volume in self.store.volumes()? {
            if is_untrusted(&volume.name) {
                let versions = self.store.versions(volume.id)?;
                bytes += versions.iter().map(|v| v.new_bytes).sum::<u64>();
            }
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_trusted_only_where_nothing_is_in_doubt() {
        let facts = |foreign, protected| Asker::Agent(JobFacts { foreign, protected });
        let mut policy = TrustPolicy::default();
        for (asker, free, strict) in [
            (Asker::Administrator, true, true),
            (Asker::User(7), false, false),
            (facts(None, None), false, false),
            (facts(None, Some(true)), false, false),
            (facts(Some(true), Some(true)), false, false),
            (facts(Some(false), None), true, false),
            (facts(Some(false), Some(false)), true, false),
            (facts(Some(false), Some(true)), true, true),
        ] {
            for (protected_only, trusted) in [(false, free), (true, strict)] {
                policy.protected_only = protected_only;
                let verdict = policy.judge(&asker);
                assert_eq!(
                    verdict == Verdict::Trusted,
                    trusted,
                    "{asker:?} {protected_only}"
                );
            }
        }
        policy.scopes = true;
        assert_eq!(policy.judge(&Asker::User(7)), Verdict::Scope);
    }

    #[test]
    fn no_name_of_a_branch_leads_to_the_scope_of_a_user_or_back() {
        let agent = Asker::Agent(JobFacts::default());
        let user = scope(&Asker::User(7), Some("pr-1"), 7);
        assert_eq!(
            user,
            scope(&agent, None, 7),
            "what names none is its user's"
        );
        let policy = TrustPolicy::default();
        let volume = |scope: &str| format!("shop{UNTRUSTED}{scope}");
        assert!(policy.may_user_read(&volume(&user), 7));
        for name in [
            "uid-7",
            "uid/7",
            "uid",
            "7",
            "../uid/7",
            "x/untrusted/uid/7",
            "",
        ] {
            let named = scope(&agent, Some(name), 8);
            assert_ne!(named, user, "{name}");
            assert!(!policy.may_user_read(&volume(&named), 7), "{name}");
        }
        for uid in [77, 0] {
            assert!(!policy.may_user_read(&volume(&user), uid), "{uid}");
        }
    }

    #[test]
    fn what_is_not_said_to_be_readable_is_not() {
        let mut policy = TrustPolicy::default();
        assert!(!policy.may_read("npm"));
        policy
            .set_readable(&["npm".into(), "shop/**".into()])
            .unwrap();
        for (volume, readable) in [
            ("npm", true),
            ("npm2", false),
            ("npm/x", false),
            ("shop/a/b", true),
            ("other/npm", false),
            ("shop/untrusted/pr-1", false),
        ] {
            assert_eq!(policy.may_read(volume), readable, "{volume}");
        }
        assert!(policy.set_readable(&["a{".into()]).is_err());
    }
}
