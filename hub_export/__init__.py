"""Models to folders for the Hub: conversion from LLaVA, export, a check in a clean process, push."""
