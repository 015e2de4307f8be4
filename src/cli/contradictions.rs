//! Options that make no sense together, where that depends on more than which of them are there.

use std::collections::HashSet;

use clap::parser::ValueSource;
use clap::{ArgMatches, Args};

use super::ending::When;
use super::{Cli, Command, ForkOptions};

/// Refuses options of which one would be ignored; says what is wrong.
pub(super) fn refuse(cli: &Cli, matches: &ArgMatches) -> Result<(), String> {
    let of_command = matches.subcommand().map(|(_, matches)| matches);
    let is_given =
        |id: &str| of_command.and_then(|m| m.value_source(id)) == Some(ValueSource::CommandLine);
    match &cli.command {
        Command::Run(_) if !is_given("volume") => {
            let own = ForkOptions::augment_args(clap::Command::new("run"));
            let own = own.get_arguments().map(|option| option.get_id().as_str());
            match own.chain(["commit", "success"]).find(|id| is_given(id)) {
                Some(id) => Err(format!("{} needs a volume (-v)", option(id))),
                None => Ok(()),
            }
        }
        Command::Run(_) | Command::Attach(_) => {
            let commits = is_given("commit") && !chosen(of_command, When::Never);
            let view = ["read_only", "ephemeral"]
                .into_iter()
                .find(|id| is_given(id));
            match view.filter(|_| commits) {
                Some(id) => Err(format!("--commit commits nothing with {}", option(id))),
                None => Ok(()),
            }
        }
        Command::Stats { prometheus: true } if cli.json => {
            Err("--prometheus is another format than --json".into())
        }
        _ => Ok(()),
    }?;
    let labels = match &cli.command {
        Command::Run(_) | Command::Attach(_) | Command::Fork(_) | Command::Commit(_) => {
            of_command.and_then(|matches| matches.get_many::<(String, String)>("label"))
        }
        _ => None,
    };
    let mut keys = HashSet::new();
    match labels
        .into_iter()
        .flatten()
        .find(|(key, _)| !keys.insert(key))
    {
        Some((key, _)) => Err(format!("--label {key} is there twice")),
        None => Ok(()),
    }
}

/// An option as it is written.
fn option(id: &str) -> String {
    format!("--{}", id.replace('_', "-"))
}

fn chosen(matches: Option<&ArgMatches>, when: When) -> bool {
    matches.and_then(|matches| matches.get_one::<When>("commit")) == Some(&when)
}
