"""The report's page: template, style and script as files, and how they become one."""
