"""Every estimator and update held against the exact gradient of small worlds."""

from policygrad.verify.command import Report as Report, run as run, verify as verify
from policygrad.verify.options import VerifyOptions as VerifyOptions
from policygrad.verify.statistics import Finding as Finding, Row as Row, Section as Section
from policygrad.verify.updates import Check as Check
